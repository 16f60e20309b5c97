"""Rows of tables as they are measured: kept in a JSON file, shown in a Markdown file, both written after each."""

import json
import os
from pathlib import Path

from benchmarks.measure import table

FAILED, TIMELESS = "failed", "not run"


class Record:
    """What was measured, by table and by the name of the measurement, which may give several rows.

    Args:
        stem: path of the two files without their endings.
        about: what the numbers belong to: title, text, captions by table; numbers of something else in the file are
            not carried on.

    Attributes:
        carried_on: measurements that were in the file.
    """

    def __init__(self, stem: Path, about: dict):
        self.stem, self.about, self.tables = stem, about, {}
        stem.parent.mkdir(parents=True, exist_ok=True)
        path = stem.with_suffix(".json")
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["about"] == about:
                self.tables = stored["tables"]
        self.carried_on = sum(self.is_done(title, name) for title in self.tables for name in self.tables[title])

    def forget(self, title: str, name: str) -> None:
        self.tables.get(title, {}).pop(name, None)

    def is_done(self, title: str, name: str) -> bool:
        """Whether there is a result; what failed or was not run is tried again."""
        return "rows" in self.tables.get(title, {}).get(name, {})

    def put(self, title: str, name: str, result: dict) -> None:
        """Keeps one measurement and writes both files.

        Args:
            result: "rows", by name a value for each column, and "took", what measuring them took in seconds; or, with
                its reason, FAILED or TIMELESS.
        """
        self.tables.setdefault(title, {})[name] = result
        whole = json.dumps({"about": self.about, "tables": self.tables}, indent=1)
        for ending, text in ((".json", whole + "\n"), (".md", self.markdown())):
            temporary = self.stem.with_suffix(ending + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.stem.with_suffix(ending))

    def markdown(self) -> str:
        """Every table, then what failed and what was not run."""
        parts = [f"# {self.about['title']}\n", f"{self.about['text']}\n"]
        left = []
        for title, measurements in self.tables.items():
            rows = {row: cells for m in measurements.values() for row, cells in m.get("rows", {}).items()}
            columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
            shown = [[row, *(_text(cells.get(column, "")) for column in columns)] for row, cells in rows.items()]
            if rows:
                caption = self.about["captions"].get(title)
                parts.append(f"## {title}\n\n{table(['', *columns], shown)}\n" + (f"\n{caption}\n" if caption else ""))
            for name, result in measurements.items():
                left += [[title, name, word, result[word]] for word in (FAILED, TIMELESS) if word in result]
        if left:
            parts.append(f"## Not measured\n\n{table(['table', 'row', 'what', 'why'], left)}\n")
        return "\n".join(parts)


def outcome(result: dict) -> str:
    """Why a result has no numbers; empty if it has."""
    notes = [cells["note"] for cells in result.get("rows", {}).values() if list(cells) == ["note"]]
    return next((result[word] for word in (FAILED, TIMELESS) if word in result), "; ".join(notes))


def _text(value) -> str:
    """Four digits of a number; a text stays, but for what would end the cell."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
