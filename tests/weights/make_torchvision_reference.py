"""Writes torchvision_reference.json: names and shapes of state dicts, and logits, of torchvision.

In an environment of its own, which needs no JAX, from the root of the repository:

  pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31
  python -m tests.weights.make_torchvision_reference
"""

import json
import pathlib

import timm
import torch
import torchvision

from tests.weights.generated import generated, images, packed, unpacked

# What torchvision calls a network, and the size of the images.
NETWORKS = {"resnet18": 64, "resnet50": 64, "shufflenet_v2_x1_0": 64, "vgg16": 224, "vgg16_bn": 224}
CLASSES = 10  # of which logits are kept


def shapes_of(network):
    """Names and shapes of a state dict; the counters of norms are left out."""
    named = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: shape for name, shape in named.items() if "num_batches_tracked" not in name}
    assert unpacked(packed(shapes)) == shapes
    return shapes


def logits_of(network, size):
    """Of the generated weights and images, in evaluation and float64."""
    tensors = {name: torch.from_numpy(generated(name, s)) for name, s in shapes_of(network).items()}
    missing = network.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches_tracked" in name for name in missing.missing_keys)
    batch = torch.from_numpy(images(size).transpose(0, 3, 1, 2).copy()).double()
    with torch.no_grad():
        return network.double().eval()(batch)[:, :CLASSES].tolist()


def main():
    versions = f"torchvision {torchvision.__version__}, timm {timm.__version__}"
    record = {"made_by": f"make_torchvision_reference.py, {versions}, float64"}
    for name, size in NETWORKS.items():
        network = getattr(torchvision.models, name)()
        record[name] = {"size": size, "shapes": packed(shapes_of(network))}
        record[name]["logits"] = logits_of(network, size)
    for name in ("resnet18", "resnet50d"):
        record[f"timm_{name}"] = {"shapes": packed(shapes_of(timm.create_model(name)))}
    path = pathlib.Path(__file__).with_name("torchvision_reference.json")
    lines = [f"{json.dumps(key)}: {json.dumps(record[key])}" for key in record]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
