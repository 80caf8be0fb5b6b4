"""Have espeak-ng say four sentences, one voice each, and keep them as one recording at 24,000 samples a second.

    python -m enginewright.training.speech  # a second; writes toolchain/models/weights/speech.wav

Needs espeak-ng (``apt-get install espeak-ng``); the recording that ships is by version 1.51. The sentences are of the
first of the Harvard lists (IEEE 1969, Recommended Practice for Speech Quality Measurements).
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import wave

import numpy as np

from enginewright.ground.signature import Array
from enginewright.models.blocks.speech import RATE, RECORDING

SENTENCES = {
    "en-us": "The birch canoe slid on the smooth planks.",
    "en-gb+f3": "Glue the sheet to the dark blue background.",
    "en-us+m7": "It's easy to tell the depth of a well.",
    "en-gb-scotland+f2": "These days a chicken leg is a rare dish.",
}
"""What each voice says."""


def spoken(program: str, voice: str, text: str) -> Array:
    """One sentence, (samples,) at ``RATE``, in [-1, 1)."""
    run = subprocess.run([program, "-v", voice, "--stdout", text], capture_output=True, check=True)
    with wave.open(io.BytesIO(run.stdout)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return resampled(samples / 2**15, rate)


def resampled(samples: Array, rate: int) -> Array:
    """The same sound at ``RATE``, which is the higher one: its spectrum stays, and above it comes nothing."""
    count = len(samples) * RATE // rate
    return np.fft.irfft(np.fft.rfft(samples), count) * count / len(samples)


def main() -> None:
    """Write the recording."""
    program = shutil.which("espeak-ng")
    if program is None:
        sys.exit("espeak-ng was not found; apt-get install espeak-ng")
    samples = np.concatenate([spoken(program, voice, text) for voice, text in SENTENCES.items()])
    with wave.open(str(RECORDING), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 2**15).round().clip(-(2**15), 2**15 - 1).astype("<i2").tobytes())
    print(f"{len(samples) / RATE:.2f} s of speech in {RECORDING.name}")


if __name__ == "__main__":
    main()
