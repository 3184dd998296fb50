"""What is wrong with settings, for the user who gave them."""

from __future__ import annotations


class SettingsError(Exception):
    """The settings are wrong; the text names every bad field, its value and its limit."""
