"""The page of all keys says what the settings say."""

from pathlib import Path

from settings_page import page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_of_all_keys_is_that_of_the_settings() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/config/settings_page.py > docs/settings.md"


def test_every_key_is_told_with_its_limits() -> None:
    said = page()
    for row in (
        "| `deadline_ms` | – | integer, from 1, to 2147483647 |",
        "| `max_frame_mpx` | `25` | number, above 0, to 400 |",
        '| `masks` | `"fail"` | `"fail"` `"always"` `"never"` |',
        "| `multimask` | `[true, true, true]` | list of 3 x `true` `false` |",
        "| `curve_secret` | – | path |",
        "| `udp_ports` |",
    ):
        assert row in said
    assert said.count("\n## ") > 15
