"""What a result was measured on, and where results are kept: one JSON file a group of benchmarks, written after every row."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = "cpu"  # how the folders of machines without a GPU begin

PACKAGES = ("torch", "triton", "numpy", "transformers", "llms-from-scratch", "tiktoken", "tokenizers")
# Peers that few have: named in a record where they are installed.
PEERS = ("liger-kernel", "flash-attn", "flash-attn-3", "quack-kernels", "cut-cross-entropy", "ctranslate2")
# nvidia-smi's names -> ours; read where a row is timed
STATE = {
    "clocks.sm": "sm_MHz",
    "clocks.mem": "memory_MHz",
    "power.draw": "power_W",
    "temperature.gpu": "temperature_C",
    "clocks_event_reasons.active": "throttle_reasons",
}


def machine_name() -> str:
    """The folder of results/ that this machine's records belong in: "nvidia-h100-80gb-hbm3", "cpu-amd-epyc"."""
    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
    family = re.sub(r"\(\w+\)|@.*|\bprocessor\b|\bcpu\b|\b\S*\d\S*", " ", cpu_name(), flags=re.IGNORECASE)
    return f"{CPU}-{_slug(family)}".rstrip("-")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_record(command: str, timestamp: str, **more: Any) -> dict[str, Any]:
    """Machine, versions, commit and command of a run. `timestamp` is the caller's; what can't be had is null."""
    record: dict[str, Any] = {
        "timestamp": timestamp,
        "command": command.replace(f"{ROOT}{os.sep}", ""),
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--", "fastgpt", "kernels")),
        "sources": source_digest(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "versions": {name: version(name) for name in PACKAGES + PEERS if name in PACKAGES or version(name)},
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads",
        **more,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "device": properties.name,
            "capability": properties.major * 10 + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "memory_GB": properties.total_memory / 1e9,
            "l2_MB": properties.L2_cache_size / 1e6,
            "cuda": torch.version.cuda,
            "driver": smi("driver_version"),
            "power_limit_W": smi("power.limit"),
            "max_sm_MHz": smi("clocks.max.sm"),
        }
    return record


def state() -> dict[str, Any] | None:
    """Clocks, power and temperature of the GPU at this moment, null where there is no nvidia-smi; of a CPU, what Linux says
    of its clocks, and how many processes want them."""
    if torch.cuda.is_available():
        found = smi(",".join(STATE))
        return None if found is None else dict(zip(STATE.values(), map(str.strip, found.split(",")), strict=False))
    info = Path("/proc/cpuinfo")
    clocks = re.findall(r"cpu MHz\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else []
    return {"cpu_MHz": [float(clock) for clock in clocks], "load_average": round(os.getloadavg()[0], 2)}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def source_digest() -> str:
    """Of the sources that were measured: a checkout without git knows no commit."""
    digest = hashlib.sha256()
    for room in ("fastgpt", "kernels"):
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def smi(query: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


class Store:
    """The runs and rows of one group. Opening it continues what is there; every `add` leaves a whole file behind."""

    def __init__(self, directory: Path, group: str) -> None:
        self.path = directory / f"{group}.json"
        self.runs: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            held = json.loads(self.path.read_text(encoding="utf-8"))
            self.runs, self.rows = held["runs"], held["rows"]

    def start(self, run: dict[str, Any]) -> None:
        """The rows that follow belong to `run`."""
        self.runs.append(run)

    def has(self, benchmark: str, case: str, provider: str, failures: bool = False) -> bool:
        """Whether there is a row that needn't be measured again; unless `failures`, what failed may have been mended."""
        held = [row for row in self.rows if _key(row) == (benchmark, case, provider)]
        return any(failures or row["status"] in ("ok", "absent") for row in held)

    def add(self, row: dict[str, Any]) -> None:
        """Keep `row` in place of any older one of the same benchmark, case and provider."""
        self.rows = [old for old in self.rows if _key(old) != _key(row)]
        self.rows.append({**row, "run": len(self.runs) - 1})
        used = sorted({old["run"] for old in self.rows})
        self.runs = [self.runs[i] for i in used]
        for old in self.rows:
            old["run"] = used.index(old["run"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        lines = ",\n".join(json.dumps(kept) for kept in self.rows)
        runs = ",\n".join(json.dumps(run, indent=1) for run in self.runs)
        partial.write_text(f'{{"runs": [\n{runs}\n],\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
        partial.replace(self.path)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["benchmark"], row["case"], row["provider"]
