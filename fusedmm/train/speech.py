"""Names spoken offline by eSpeak NG, as log-mel frames in a checksummed cache.

The library and its voices come with the PyPI package `espeakng-loader`; synthesis is called through
ctypes. Left out: any voice that needs a download.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedmm.models.checkpoint import atomic_path

log = logging.getLogger(__name__)

VOICES = ("en-us", "en-gb-x-rp+f3", "en-gb-scotland")
MELS, FRAMES, HOP, WINDOW = 40, 160, 441, 1024  # 20 ms a frame at 22,050 Hz: 3.2 s
_RETRIEVAL_SYNCHRONOUS, _UTF8 = 2, 1


class Speaker:
    """eSpeak NG in this process: text to samples.

    Raises: ModuleNotFoundError, the packages of the `recipes` extra are missing. RuntimeError,
        eSpeak does not start.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "speech: espeakng-loader is not installed; pip install 'fusedmm[recipes]'"
            ) from error
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        path = espeakng_loader.get_data_path().encode()
        self.rate = self.lib.espeak_Initialize(_RETRIEVAL_SYNCHRONOUS, 0, path, 0)
        if self.rate <= 0:
            raise RuntimeError(f"speech: eSpeak NG did not start from {path.decode()}")
        self._samples: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )

        def heard(wave: object, count: int, events: object) -> int:
            if wave and count > 0:
                self._samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
            return 0

        self._callback = kind(heard)  # held: the library keeps only its address
        self.lib.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: str) -> np.ndarray:
        """Samples of one text, int16 at `rate`."""
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"speech: voice: expected one of eSpeak NG's, got {voice!r}")
        self._samples.clear()
        raw = text.encode()
        self.lib.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, 0, 0, _UTF8, None, None)
        return np.concatenate(self._samples) if self._samples else np.zeros(1, np.int16)


def mel_filters(rate: int) -> Tensor:
    """[MELS, 1 + WINDOW // 2] triangles, evenly spaced in mel between 60 Hz and half the rate."""

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    points = torch.linspace(mel(60.0), mel(rate / 2), MELS + 2, dtype=torch.float64)
    hz = 700 * (10 ** (points / 2595) - 1)
    bins = torch.linspace(0, rate / 2, 1 + WINDOW // 2, dtype=torch.float64)
    low, mid, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
    up, down = (bins - low) / (mid - low), (high - bins) / (high - mid)
    return torch.minimum(up, down).clamp(min=0).float()


def log_mel(samples: np.ndarray, filters: Tensor) -> Tensor:
    """[MELS, FRAMES] fp16 with zero mean and unit scale over a typical voice; cut or padded."""
    wave = torch.from_numpy(samples.astype(np.float32) / 2**15)[: FRAMES * HOP]
    wave = torch.nn.functional.pad(wave, (0, FRAMES * HOP - len(wave)))
    window = torch.hann_window(WINDOW)
    power = torch.stft(wave, WINDOW, HOP, window=window, return_complex=True).abs().square()
    mel = (filters @ power)[:, :FRAMES]
    return ((mel + 1e-5).log10() / 2 + 1).half()


def spoken(
    cache_dir: str | Path,
    texts: Sequence[str],
    voice: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Each text in that voice, [len(texts), MELS, FRAMES] fp16, from the cache or made for it."""
    key = hashlib.sha256(json.dumps([voice, MELS, FRAMES, HOP, *texts]).encode()).hexdigest()
    path = Path(cache_dir) / f"spoken-{voice}-{len(texts)}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            meta, mel = file.metadata() or {}, file.get_tensor("mel")
        if meta.get("key") == key and meta.get("sha256") == _digest(mel):
            return mel
        log.info("speech: %s holds other texts or is damaged; speaking again", path)
    except FileNotFoundError:
        pass
    except (SafetensorError, OSError) as error:
        log.warning("speech: %s is damaged (%s); speaking again", path, error)
    speaker = Speaker()
    filters = mel_filters(speaker.rate)
    mel = torch.empty(len(texts), MELS, FRAMES, dtype=torch.float16)
    for i, text in enumerate(texts):
        mel[i] = log_mel(speaker.say(text, voice), filters)
        if on_progress is not None:
            on_progress(i + 1, len(texts))
    with atomic_path(path) as tmp:
        save_file({"mel": mel}, tmp, {"key": key, "sha256": _digest(mel)})
    return mel


def _digest(mel: Tensor) -> str:
    return hashlib.sha256(mel.numpy().tobytes()).hexdigest()
