"""The table of architectures, by family."""

from building import Architecture
from decoders import DECODERS, MIXTURES, STATE_SPACES
from encoders import ENCODER_DECODERS, ENCODERS
from modalities import DENOISERS, IMAGES, SEEN, SOUNDS

ARCHITECTURES: tuple[Architecture, ...] = (
    *DECODERS, *MIXTURES, *STATE_SPACES, *ENCODERS, *ENCODER_DECODERS, *IMAGES, *SOUNDS, *SEEN, *DENOISERS,
)  # fmt: skip
