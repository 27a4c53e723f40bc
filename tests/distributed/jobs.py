"""Run several commands one after the other in each process, since starting processes costs more than the commands.

`JOBS` holds the words of each command as JSON: a launcher runs this module again in each process it starts.
"""

import json
import os
import runpy
import sys

if __name__ == "__main__":
    for module, *words in json.loads(os.environ["JOBS"]):
        sys.argv[1:] = words
        runpy.run_module(module, run_name="__main__")
