"""What `make train` says last: whether README lists these weights for this Python, this machine and this corpus.

python tests/listed_weights.py README.md CORPUS RUN
"""

import json
import platform
import sys
from pathlib import Path


def verdict(readme: str, python: str, machine: str, content: str, weights: str) -> str:
    """One line. README's rows are `| Python | machine | content | weights |`."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in readme.splitlines()]
    listed = [row[2:] for row in rows if row[:2] == [python, machine]]
    here = f"Python {python} on {machine}"
    if [content, weights] in listed:
        return f"README lists these weights for {here} and this corpus"
    same_corpus = [other for corpus, other in listed if corpus == content]
    if same_corpus:
        return (
            f"NOT the weights that README lists for {here} and this corpus, {same_corpus[0]}: a run of another version "
            "(make train RUN=runs/new trains anew), a CPU without fused multiply-add, or a bug: see DESIGN.md, bits"
        )
    if listed:
        return f"README lists weights for {here} with the corpus {listed[0][0]}, this one is {content}: not comparable"
    return f"README lists no weights for {here}"


def main(readme: str, corpus: str, run: str) -> None:
    done, catalog = Path(run, "DONE"), Path(corpus, "catalog.json")
    if done.exists():  # else the training was stopped
        weights, content = (
            json.loads(p.read_text())[key] for p, key in ((done, "weights_sha256"), (catalog, "content"))
        )
        python = ".".join(platform.python_version_tuple()[:2])
        print(verdict(Path(readme).read_text(), python, platform.machine(), content[:12], weights))


if __name__ == "__main__":
    main(*sys.argv[1:])
