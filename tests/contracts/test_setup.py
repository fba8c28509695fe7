"""Set-up: pip's configuration reaches uv."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "uv_options.py"


@pytest.fixture(scope="module")
def script():
    if not SCRIPT.exists():
        pytest.skip("only in the repository")
    spec = importlib.util.spec_from_file_location("uv_options", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_indexes_links_and_constraints_become_options(script):
    listing = """:env:.find-links='/wheels /more'
global.constraint='/etc/limits.txt'
global.extra-index-url='https://one/simple\\nhttps://two/simple'
global.index-url='https://mirror/simple'
freeze.timeout='10'
"""
    assert script.options(script.settings(listing), {}) == [
        "--index-strategy=unsafe-best-match",
        "--default-index=https://mirror/simple",
        "--extra-index-url=https://one/simple",
        "--extra-index-url=https://two/simple",
        "--find-links=/wheels",
        "--find-links=/more",
        "--constraint=/etc/limits.txt",
    ]


def test_variables_count_more_than_files_in_any_order(script):
    assert script.settings(":env:.index_url='https://b'\nglobal.index-url='https://a'\n") == {"index-url": "https://b"}
    assert script.settings("global.index-url='https://a'\ninstall.index-url='https://b'\n") == {
        "index-url": "https://b"
    }


def test_certificates_proxy_and_time_limit_become_variables_unless_set(script):
    values = {"cert": "/ca.pem", "proxy": "http://proxy:3128", "default-timeout": "180", "no-index": "1"}
    lines = script.options(values, {"SSL_CERT_FILE": "/mine.pem"})
    assert lines[1:] == ["--no-index", "ALL_PROXY=http://proxy:3128", "UV_HTTP_TIMEOUT=180"]
