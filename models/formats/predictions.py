"""What the UNet of a single file predicts, as marked in the file itself."""

from __future__ import annotations

from typing import NamedTuple

from models.errors import CheckpointError
from models.formats.config_files import shortened
from models.formats.safetensors import Header
from models.spec import Prediction

V_KEY, ZERO_TERMINAL_SNR_KEY = "v_pred", "ztsnr"  # empty tensors that mark v-prediction and zero terminal SNR
# Some tools write it into the header of a safetensors file instead.
HEADER_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
HEADER_VALUES: dict[str, Prediction] = {
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "eps_pred", "noise"), "epsilon"),
    **dict.fromkeys(("sample", "x0", "x_0", "original_sample"), "sample"),
}


class Known(NamedTuple):
    """A prediction, and where it was found, in words for the user."""

    prediction: Prediction
    origin: str


def read_prediction(name: str, header: Header) -> Known | None:
    """The prediction that a file is marked with. Raises CheckpointError for an unsupported one."""
    if V_KEY in header.tensors:
        return Known("v_prediction", f"the tensor {V_KEY}")
    for key in HEADER_KEYS:
        value = header.metadata.get(key, "").strip().lower()
        if value in HEADER_VALUES:
            return Known(HEADER_VALUES[value], f"{key} in the file's header")
        if value:
            raise CheckpointError(
                f"{name}: {key} in its header is {shortened(value)}; supported are epsilon, v and sample"
            )
    return None


def has_zero_terminal_snr(header: Header) -> bool:
    """Whether a file is marked for betas that are rescaled to zero terminal SNR."""
    return ZERO_TERMINAL_SNR_KEY in header.tensors
