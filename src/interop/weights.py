"""The check that imported weights fit our U-Net."""

from functools import partial
from typing import Any

import torch

from src.errors import first_names
from src.interop.imported import ImportedModel
from src.models.conditioning import ClassEmbedding
from src.models.unet import UNet


def check_fit(imported: ImportedModel, names: dict[str, str]) -> ImportedModel:
    """Return the argument; raise ValueError unless its weights are those of the U-Net that it describes.

    `names` maps the names of our weights to those in the file.
    """
    condition: Any = None
    if imported.num_classes is not None:  # ClassEmbedding has one more row, for the empty class
        rows = imported.num_classes + imported.has_null_class
        condition = partial(ClassEmbedding, num_classes=rows - 1)
    with torch.device("meta"):
        net = UNet(**imported.model, condition=condition)
    expected = {name: value.shape for name, value in net.state_dict().items()}
    present = {name: value.shape for name, value in imported.weights.items()}
    if missing := sorted(expected.keys() - present.keys()):
        raise ValueError(f"init_from: the file has no weights for {first_names(missing)}; it is incomplete")
    if unknown := sorted(names.get(name, name) for name in present.keys() - expected.keys()):
        raise ValueError(f"init_from: the file has weights for no layer of this network: {first_names(unknown)}")
    for name, shape in expected.items():
        if present[name] != shape:
            raise ValueError(
                f"init_from: {names.get(name, name)} has shape {list(present[name])}, and this network needs "
                f"{list(shape)}; it is a different network"
            )
    return imported
