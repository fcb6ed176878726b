"""Results as JSON, which has numbers that are finite alone."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["json_text"]


def json_text(found: Any) -> str:
    """JSON of data made of dictionaries, sequences, numbers and text.

    NaN becomes null, and an infinite number text, "inf" or "-inf".
    """
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)
