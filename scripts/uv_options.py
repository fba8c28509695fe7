"""pip's configuration as uv's: options for ``uv pip install``, one a line, and variables as lines ``NAME=value``.

    python scripts/uv_options.py

uv reads neither PIP_* variables nor pip's configuration files. What decides where packages come from is carried over:
indexes, links, constraints, certificates, proxy, hosts to trust, time limit. All indexes count the same, as with pip.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
SECTIONS = ("global", "install", ":env:")  # later ones count more


def settings(listing: str) -> dict[str, str]:
    """What ``pip config list`` shows, without the sections: ``{"index-url": ...}``."""
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section not in SECTIONS or not value:
            continue
        key, rank = key.replace("_", "-").lower(), SECTIONS.index(section)
        if rank >= found.get(key, (-1, ""))[0]:
            found[key] = rank, str(ast.literal_eval(value))
    return {key: value for key, (_, value) in found.items()}


def options(values: dict[str, str], environ: dict[str, str]) -> list[str]:
    """uv's options and variables; a variable that is set already stays as it is."""
    lines = ["--index-strategy=unsafe-best-match"]
    for key, option in OPTIONS.items():
        lines += [f"{option}={one}" for one in values.get(key, "").split()]
    if values.get("no-index", "0").lower() in ("1", "true", "yes", "on"):
        lines.append("--no-index")
    for key, name in VARIABLES.items():
        if key in values and name not in environ:
            lines.append(f"{name}={values[key]}")
    return lines


def main() -> None:
    """Print them."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    print("\n".join(options(settings(listing.stdout), dict(os.environ))))


if __name__ == "__main__":
    main()
