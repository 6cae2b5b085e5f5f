"""For developers: python -m kilonova.companions.guest DIR builds the image in DIR and says what came out."""

import sys
from pathlib import Path

import msgspec

from kilonova.companions.guest.build import build

image = build(Path(sys.argv[1]), progress=lambda sentence: print(sentence, file=sys.stderr))  # noqa: T201
sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(image, enc_hook=str)) + b"\n")
