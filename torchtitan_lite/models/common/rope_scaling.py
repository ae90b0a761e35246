"""Parameters of Llama 3.1's stretched rotary frequencies. No torch, so that model arguments stay free of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Frequencies with a wavelength beyond original_max_seq_len / low_freq_factor are divided by `factor`,
    those below original_max_seq_len / high_freq_factor are kept, the ones between are blended."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
