"""What the UNet of a single file predicts, and how that is known."""

from __future__ import annotations

from typing import NamedTuple

from models.errors import CheckpointError
from models.formats.config_files import shortened
from models.formats.safetensors import Header
from models.spec import Prediction

V_KEY, ZERO_TERMINAL_SNR_KEY = "v_pred", "ztsnr"  # empty tensors that mark files of such models
# Some tools write it into the header of a safetensors file instead.
HEADER_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
HEADER_VALUES: dict[str, Prediction] = {
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "eps_pred", "noise"), "epsilon"),
}


class Known(NamedTuple):
    """A prediction, and what says so."""

    prediction: Prediction
    origin: str


def read_prediction(name: str, header: Header) -> Known | None:
    """What a file says itself. Raises CheckpointError for a prediction that is not supported."""
    if V_KEY in header.tensors:
        return Known("v_prediction", f"the tensor {V_KEY}")
    for key in HEADER_KEYS:
        value = header.metadata.get(key, "").strip().lower()
        if value in HEADER_VALUES:
            return Known(HEADER_VALUES[value], f"{key} in the file's header")
        if value:
            raise CheckpointError(
                f"{name}: {key} in its header is {shortened(value)}; supported are epsilon and v"
            )
    return None


def has_zero_terminal_snr(header: Header) -> bool:
    """Whether a file is marked for betas that are rescaled to zero terminal SNR."""
    return ZERO_TERMINAL_SNR_KEY in header.tensors
