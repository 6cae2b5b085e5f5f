"""The door: `kilonova COMMAND`."""

import sys

import kilonova


def main() -> int:
    if sys.argv[1:] == ["--version"]:
        print(f"kilonova {kilonova.__version__}")
        return 0
    print("usage: kilonova [--version] [--help] COMMAND …\n\n  test    test everything, or a part")
    return 0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main())
