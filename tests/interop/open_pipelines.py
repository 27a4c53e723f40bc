"""Open folders with diffusers alone, and sample: `python open_pipelines.py FOLDER`, in a process without this project.

Each folder FOLDER/NAME has a pipeline, and call.json with the arguments of its call. The images go to FOLDER/results.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors.torch import save_file

if __name__ == "__main__":
    assert importlib.util.find_spec("src") is None
    root = Path(sys.argv[1])
    os.chdir(root)
    exec((root / "lines.py").read_text())  # the lines that an export prints
    logging.disable_progress_bar()
    images = {}
    for path in sorted(root.glob("*/call.json")):
        call = json.loads(path.read_text())
        trust = (path.parent / "unet_pipeline.py").exists()
        pipeline = DiffusionPipeline.from_pretrained(path.parent, trust_remote_code=trust)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images[path.parent.name] = pipeline(generator=generator, output_type="pt", **call).images.contiguous()
    save_file(images, root / "results.safetensors")
    assert not any(name == "src" or name.startswith("src.") for name in sys.modules)
