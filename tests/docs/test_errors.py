"""docs/errors.md lists every error with the status that the server answers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from gr_core import errors
from gr_serve_grpc.status import CODES

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:`(\w+)`)? *\|", PAGE, re.MULTILINE)


def test_every_error_is_listed_with_its_status():
    concrete = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.GrError) and kind not in (errors.GrError, errors.UserError)
    }
    expected = {kind.__name__: CODES[kind].name if kind in CODES else "" for kind in concrete}
    assert dict(row for row in ROWS if row[0][0].isupper()) == expected
