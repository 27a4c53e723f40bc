"""Exit with the command to type for `python src/train.py`, and for `python -m src.train` in the folder `src`.

Python then searches that folder first, and imports this file as `src`.
"""

import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent
_words = [word.removesuffix(".py").replace("/", ".").rpartition(".")[2] for word in sys.orig_argv]
_command = next((word for word in _words if (_folder / f"{word}.py").is_file()), "train")
sys.stderr.write(f"error: src is a package; type python -m src.{_command} in the folder {_folder.parent}\n")
sys.exit(2)
