"""The dashboard's frame: every page is there, and the two sources answer alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from hansa.core import questions
from hansa.core.errors import RunError
from hansa.core.store import Round, RunStore
from hansa.ui.serve import SCRIPT
from hansa.ui.site import Site, configure
from hansa.ui.source import Folder

RECIPE = '[algorithm]\nname = "fedavg"\n\n[stop]\nrounds = 4\n'


def test_the_dashboard_opens_on_an_empty_folder(tmp_path: Path) -> None:
    configure(Site(source=Folder(tmp_path)))
    app = AppTest.from_file(str(SCRIPT), default_timeout=60).run()
    assert not app.exception
    assert app.title[0].value == "Runs"


def test_a_curve_is_binned_in_the_database(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "a", name="a", seed=1, recipe=RECIPE, facts={"clients": "3"}) as store:
        for index, accuracy in enumerate((0.1, 0.3, 0.5, 0.6), start=1):
            store.append(
                Round(
                    index=index,
                    time=2.0 * index,
                    wall=0.5 * index,
                    bytes_up=10,
                    bytes_down=20,
                    metrics={"accuracy": accuracy},
                )
            )
        source = Folder(tmp_path)
        run = source.run("a")
        assert (run.status, run.rounds, run.total, run.fraction) == ("running", 4, 4, 1.0)
        assert (run.last, run.best, run.clients) == (0.6, 0.6, 3)
        curve = source.ask(questions.curve, "a", metrics=["accuracy"], bins=2)
    assert curve["round"] == [2, 4]
    assert curve["time"] == [4.0, 8.0]
    assert curve["sent"] == [60, 120]
    assert curve["value"] == pytest.approx([0.2, 0.55])
    assert (curve["low"], curve["high"]) == ([0.1, 0.5], [0.3, 0.6])


def test_a_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no name of a run"):
        Folder(tmp_path / "runs").run("../secrets")
