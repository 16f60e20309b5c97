"""Keeps report.html in a run folder, and beside it report.json: what only networks and the real pairs can tell."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.errors import InputError
from utils.files import save_text
from utils.log import Aside, Log
from utils.report.charts import check_installed
from utils.report.features import pair_features, principal_plane, search_ranks, take_sample, thumbnails
from utils.report.folder import KNOWN, VERSION, first_and_shown, read_known
from utils.report.page import write_run_page
from utils.report.words import ALL_DATA, TABLE_COLUMNS, table_cells
from utils.scoring import (
    TEST_SEED,
    VALIDATION_SEED,
    Evaluation,
    NonFiniteLoss,
    evaluate_retrieval,
    evaluate_synset,
    mean_and_std,
    nearest_with_cosine,
)
from utils.sets import SynSet, load_synset, picture_grid

NEAREST = 3  # captions shown of each pair
MAP_PICTURES, SEARCH_PICTURES = 200, 50


@dataclass
class Sources:
    """What the report of a run is made from beside the run folder.

    Attributes:
        command: the command line, for the reader.
        settings: of the run, by name.
        captions, text_embed: of the real pairs; text_embed [N, D_text].
        validation, test: (RetrievalSet, text_embed [C, D_text]) each.
        encoder: name of the image encoder that the page is about, one of those of the run.
        factory, judge: `ModelFactory` of the experts, and of the networks that score sets.
        evaluation: how these train.
        experts: trajectories; the map and the search take the first one's last snapshot.
        coresets: files of sets to compare with.
    """

    command: str
    settings: dict
    captions: list[str]
    text_embed: Tensor
    validation: tuple
    test: tuple
    encoder: str
    factory: object
    judge: object
    evaluation: Evaluation
    experts: list
    coresets: list[str]


def read_coresets(paths: list[str], text_dim: int) -> dict[str, SynSet]:
    """Sets to compare with, by file. Raises InputError if one cannot be read or its texts have another width."""
    sets = {str(path): load_synset(path) for path in paths}
    for path, synset in sets.items():
        if synset.text_syn.shape[1] != text_dim:
            raise InputError(
                f"{path} holds text embeddings of width {synset.text_syn.shape[1]}, this run's text encoder gives "
                f"{text_dim}; compare with sets of the same text encoder"
            )
    return sets


def _summary(name: str, results: list[dict]) -> dict:
    mean, std = mean_and_std(results)
    return {"set": name, "networks": len(results), "mean": mean, "std": std}


class RunReport:
    """The report of one run. Without `enabled` every call does nothing.

    Raises:
        InputError: see `read_coresets`, or matplotlib is not installed.
    """

    def __init__(self, folder: Path, sources: Sources, enabled: bool = True):
        self.folder, self.sources, self.enabled, self.aside = folder, sources, enabled, Aside()
        if enabled:
            check_installed()
        self.coresets = read_coresets(sources.coresets, sources.text_embed.shape[1]) if enabled else {}
        self.known = read_known(folder) if enabled else {}
        self.search_sample = take_sample(sources.test, SEARCH_PICTURES) if enabled else None
        self.set_features = None  # of the search's sample, by the last network trained on the set

    def update(self) -> None:
        """Brings the page up to the sets and numbers that are in the folder now; see `Aside` for its errors."""
        if self.enabled:
            with self.aside("report.html"):
                self._update()

    def _update(self) -> None:
        self.known |= {"version": VERSION, "command": self.sources.command}
        self.known.setdefault("all_data", self._recalls_of_experts())
        self.known["coresets"] = self._validate_coresets()
        first, shown = first_and_shown(self.folder)
        found = self.known.get("nearest", {})
        self.known["nearest"] = {"0": found.get("0") or self._nearest(first)} if first else {}
        self.known["nearest"][str(shown.settings["iteration"])] = self._nearest(shown)
        self.known["map"] = self._map(first, shown)
        self._write()

    def on_model(self, model) -> None:
        """For `evaluate_synset`: notes how a network trained on the best set sees the search's sample."""
        if not self.enabled:
            return
        with self.aside("the report's search"):
            self.set_features = self._sample_features(self.search_sample, model)

    def finish(self, log: Log, best: SynSet, results: dict[str, list[dict]]) -> None:
        """Adds the final table and the search; `results` are the test recalls of `best` by image encoder."""
        if self.enabled:
            with self.aside("report.html"):
                self._finish(log, best, results)

    def _finish(self, log: Log, best: SynSet, results: dict[str, list[dict]]) -> None:
        rows = self._test_rows(best, results)
        self.known["test"] = [row for row, _ in rows]
        if self.set_features is not None:
            self.known["search"] = self._search(best)
        self._update()
        cells = [
            [*(cell["text"] for cell in table_cells(row)), picture_grid(synset) if synset else None]
            for row, synset in rows
        ]
        log.final(self.sources.settings["Iteration"], [*TABLE_COLUMNS, "pictures"], cells, self.folder / "report.html")

    def _write(self) -> None:
        save_text(self.folder / KNOWN, json.dumps(self.known))
        write_run_page(self.folder)

    def _nearest(self, synset: SynSet) -> list:
        return nearest_with_cosine(synset.text_syn, self.sources.text_embed, self.sources.captions, NEAREST)

    def _recalls_of_experts(self) -> dict | None:
        """Recalls on validation of the experts after their last epoch as {set, mean, std}; None if they do not say."""
        last = [expert.recalls[-1] for expert in self.sources.experts if expert.recalls]
        return _summary(ALL_DATA, last) if last else None

    def _score(self, name: str, synset: SynSet, retrieval, seed: int) -> list[dict] | None:
        """Recalls of networks trained on a set that is compared with; None, and a line, if their loss diverges."""
        seed += self.sources.settings["seed"]
        try:
            own = synset.for_encoder(self.sources.encoder)
            return evaluate_synset(self.sources.judge, own, retrieval, self.sources.evaluation, seed)
        except NonFiniteLoss as error:
            print(f"report: no row for {name}: {error}")
            return None

    def _validate_coresets(self) -> list[dict]:
        done = {row["set"]: row for row in self.known.get("coresets", [])}
        for path, synset in self.coresets.items():
            if path not in done:
                results = self._score(path, synset, self.sources.validation, VALIDATION_SEED)
                done |= {path: _summary(path, results)} if results else {}
        return [done[path] for path in self.coresets if path in done]

    def _test_rows(self, best: SynSet, results: dict[str, list[dict]]) -> list[tuple[dict, SynSet | None]]:
        first = first_and_shown(self.folder)[0]
        compared = {"initial pairs": first} if first and best.settings["iteration"] else {}
        compared |= {Path(path).stem: synset for path, synset in self.coresets.items()}
        rows = []
        for name, synset in compared.items():
            scores = self._score(name, synset, self.sources.test, TEST_SEED)
            if scores:
                rows.append((self._row(name, synset, scores), synset))
        for encoder, recalls in results.items():
            row = self._row(f"best, iteration {best.settings['iteration']}", best.for_encoder(encoder), recalls)
            rows.append(({**row, "image_encoder": encoder}, best))
        rows.append((self._row(ALL_DATA, None, self._test_experts()), None))
        return rows

    def _row(self, name: str, synset: SynSet | None, results: list[dict]) -> dict:
        row = {**_summary(name, results), "trains": self.sources.judge.trains}
        row["image_encoder"] = self.sources.encoder
        if synset is None:
            return {**row, "trains": self.sources.factory.trains}
        return {**row, "pairs": len(synset.captions), "rates": [synset.syn_lr_img, synset.syn_lr_txt]}

    def _expert(self, expert):
        """A model with the last snapshot of `expert`."""
        model = self.sources.factory.fresh(self.sources.settings["seed"])
        model.load_state_dict(expert.snapshot(expert.epochs[-1]), strict=False)
        return model

    def _test_experts(self) -> list[dict]:
        batch_size, device = self.sources.evaluation.batch_size_test, self.sources.factory.device
        return [
            evaluate_retrieval(self._expert(expert), *self.sources.test, batch_size, device)
            for expert in self.sources.experts
        ]

    def _sample_features(self, sample, model):
        return sample.features(model, self.sources.evaluation.batch_size_test, self.sources.factory.device)

    def _search(self, best: SynSet) -> dict:
        """What the search shows; the expert is the first one's last snapshot."""
        sample = self.search_sample
        expert = self._sample_features(sample, self._expert(self.sources.experts[0]))
        return {
            "iteration": best.settings["iteration"],
            "pairs": len(best.captions),
            "captions": sample.captions,
            "pictures": thumbnails(sample),
            "set": search_ranks(*self.set_features),
            "expert": search_ranks(*expert),
        }

    def _map(self, first: SynSet | None, shown: SynSet) -> dict:
        """Places of real validation pairs and of the pairs before and after in one plane.

        All features are those of one network, the first expert's last snapshot; the plane is the PCA of the real
        pairs' image and text features together.
        """
        model = self._expert(self.sources.experts[0])
        evaluation, device = self.sources.evaluation, self.sources.factory.device
        real = self._sample_features(take_sample(self.sources.validation, MAP_PICTURES), model)
        mean, axes, explained = principal_plane(torch.cat(real))

        def place(features):
            return {
                name: ((values - mean) @ axes).mul(1e4).round().div(1e4).tolist()
                for name, values in zip(("pictures", "texts"), features, strict=True)
            }

        places = {"explained": explained, "real": place(real), "before": None}
        for name, synset in (("before", first), ("after", shown)):
            if synset is not None:
                places[name] = place(
                    pair_features(model, synset, evaluation.image_size, evaluation.batch_size_test, device)
                )
        return places
