"""One module a command: HELP, EXAMPLE, add_arguments(parser), run(arguments) -> exit status.

What a command needs of torch it imports when it runs.

    0    done
    1    it failed, or what it measured is wrong
    2    it was refused: options, files or data that can't be
    128 + n   ended by signal n: 130 by Ctrl-C, 143 by SIGTERM, 141 where a pipe's reader went away
"""

DONE, FAILED, REFUSED = 0, 1, 2


def by_signal(number: int) -> int:
    """The exit status of what a signal ended."""
    return 128 + number
