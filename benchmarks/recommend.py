"""Writes what `pelton recommend` goes by from the benchmark's journal: python benchmarks/recommend.py."""

from __future__ import annotations

from pathlib import Path

from pelton.bench.journal import Journal
from pelton.bench.summary import write_summary

HERE = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    target = HERE / "src" / "pelton" / "data" / "recommend" / "bench.csv"
    write_summary(Journal(HERE / "docs" / "data" / "bench.jsonl").records(), target)
    print(target)
