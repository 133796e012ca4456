"""`python -m fastgpt`"""

from fastgpt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
