"""Which part may run in which precision, and why not in another."""

from __future__ import annotations

from sana.run.error import ConfigError

PRECISIONS = ("auto", "bf16-mixed", "bf16-true", "32-true")
DTYPES = ("auto", "bfloat16", "float32")

NETWORK = (
    "the sums of linear attention reach 6.5e5, float16 ends at 65504; write bf16-mixed, or 32-true for weights that "
    "were trained in fp16"
)
TEXT = "Gemma-2's activations overflow in float16 and its features become infinite; write bfloat16 or float32"
AUTOENCODER = "DC-AE's activations overflow in float16 and the image turns black; write bfloat16 or float32"


def check_dtypes(precision: str, autoencoder: str, text: str) -> None:
    """Refuse a precision that a part cannot run in.

    Args:
        precision: of the network.
        autoencoder, text: dtypes of the encoders; "auto" is as in the recipe.

    Raises:
        ConfigError: with the reason.
    """
    for key, value, allowed, reason in (
        ("precision", precision, PRECISIONS, NETWORK),
        ("dtype.autoencoder", autoencoder, DTYPES, AUTOENCODER),
        ("dtype.text", text, DTYPES, TEXT),
    ):
        if value in allowed:
            continue
        if value.startswith(("16", "fp16", "half", "float16")):
            raise ConfigError(f"{key}: {value} is refused: {reason}")
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
