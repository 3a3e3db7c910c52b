"""What the shell offers for presets and setting keys; loaded only while it completes."""

from __future__ import annotations


def presets(incomplete: str) -> list[str]:
    """Presets that begin with a text. Files are the shell's own affair."""
    from quark.config.load import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def setting_keys(incomplete: str) -> list[str]:
    """Setting keys that begin with a text, each with its equals sign; the words of a key that takes words."""
    from quark.config.load import known_keys, words_of

    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={word}" for word in words_of(key) if word.startswith(value)]
    names = dict.fromkeys(known_keys())
    return [f"{name}=" for name in names if name.startswith(incomplete) and "." in name]
