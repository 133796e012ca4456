"""The code of "Build a Large Language Model (From Scratch)" over this model: change the import, keep the rest.

    from llms_from_scratch.ch04 import GPTModel, generate_text_simple     # before
    from fastgpt.compat.llms_from_scratch import GPTModel, generate_text_simple

Names and signatures are those of the package llms_from_scratch 1.0.19 and of the book's chapter files
(https://github.com/rasbt/LLMs-from-scratch): chapters 2, 4 and 5, and the KV cache of ch04/03_kv-cache and of
llms_from_scratch.kv_cache, whose own GPT-2 fails at its first cached step. What is better here, and what that changes, is said
where it is done: `model` (caches, checkpoints), `generation` (batches, the end of the context), `weights`, `training`.
"""

from fastgpt.compat.llms_from_scratch.generation import (
    generate,
    generate_text_simple,
    generate_text_simple_cached,
    generate_text_simple_stream,
    text_to_token_ids,
    token_ids_to_text,
)
from fastgpt.compat.llms_from_scratch.model import GPTModel, GPTModelFast, KVCache
from fastgpt.compat.llms_from_scratch.modules import (
    GELU,
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
)
from fastgpt.compat.llms_from_scratch.training import (
    GPTDatasetV1,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader_v1,
    evaluate_model,
    generate_and_print_sample,
    plot_losses,
    train_model_simple,
)
from fastgpt.compat.llms_from_scratch.weights import assign, load_weights_into_gpt

__all__ = [
    "GELU",
    "FeedForward",
    "GPTDatasetV1",
    "GPTModel",
    "GPTModelFast",
    "KVCache",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "assign",
    "calc_loss_batch",
    "calc_loss_loader",
    "create_dataloader_v1",
    "evaluate_model",
    "generate",
    "generate_and_print_sample",
    "generate_text_simple",
    "generate_text_simple_cached",
    "generate_text_simple_stream",
    "load_weights_into_gpt",
    "plot_losses",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]
