"""The model card of an exported network: ``README.md``, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST_LISTED = 30  # classes


def model_card(name: str, values: Mapping[str, Any]) -> str:
    """What is known of a network, and how it is used.

    Args:
      name: of the folder.
      values: its ``config.json``.
    """
    run, given = values["run"], values["input"]
    trained = ", ".join(f"{key} {value}" for key, value in run.items() if value is not None)
    classes = values["classes"]
    listed = ", ".join(classes[:_MOST_LISTED])
    more = f" and {len(classes) - _MOST_LISTED} more" if len(classes) > _MOST_LISTED else ""
    lines = [
        "---",
        "library_name: mimicnorm-jax",
        "pipeline_tag: image-classification",
        "---",
        "",
        f"# {name}",
        "",
        "A convolutional network without normalization, for inference: what normalized it in "
        "training is folded into its weights.",
        "",
        f"- Trained: {trained or 'not recorded'}.",
        f"- Input: images {_shape(given['shape'])}, channels last, float32.",
        f"- Classes: {listed + more if classes else 'not recorded'}.",
    ]
    if given["mean"] is not None:
        lines.append(
            "- Images are normalized to (image / 255 - mean) / std, mean "
            f"{_numbers(given['mean'])}, std {_numbers(given['std'])}."
        )
    if given["resize"] is not None:
        lines.append(
            f"- Before that the short side is resized to {given['resize']} pixels, and the centre "
            "is cropped."
        )
    if values["temperature"] is not None:
        lines.append(f"- Probabilities: softmax of the logits over {values['temperature']:.4g}.")
    lines += [
        "",
        "Kernels are `(height, width, in, out)`, of dense layers `(in, out)`.",
        "",
        "```python",
        "import mimicnorm_jax",
        "",
        *_usage(name, is_run=bool(values["build"])),
        "```",
        "",
        "To be filled in by whoever publishes it: intended use, limits, data, licence.",
        "",
    ]
    return "\n".join(lines)


def _usage(name: str, *, is_run: bool) -> list[str]:
    if is_run:
        return [
            f'network = mimicnorm_jax.load("{name}")',
            'probabilities = network.predict(["photo.jpg"])',
        ]
    return [
        "plain, _ = mimicnorm_jax.fold(model, images)  # your network, built as it was trained",
        f'mimicnorm_jax.load_safetensors(plain, "{name}")',
        "logits = plain(images)",
    ]


def _shape(shape: list[Any]) -> str:
    return f"({', '.join(map(str, shape))})"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
