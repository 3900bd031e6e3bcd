"""The page says what the files say, whole and offline, whatever became of the run; the pages of several runs compare."""

import json
import re
import shlex
from pathlib import Path

import pytest

from byol_core.report import page as report
from byol_core.report.__main__ import main
from byol_core.report.compare import compare
from byol_core.report.facts import read_run
from byol_core.report.page import write_report
from byol_core.run.options import TrainConfig, parse_config
from tests.helpers.reports import Page, change_json, line, write_lines, write_run

HOSTILE = '</pre><script>alert(1)</script><img src="http://x/y" onerror=alert(1)>\'"&amp;'


def page(folder: Path, under_way: bool = False) -> str:
    write_report(folder, under_way)
    return Page(folder / "report.html").text


def add_line(folder: Path, text: str) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text + "\n")


def test_page_says_what_the_files_say(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "my run"))
    for expected in ("my run", "Learned",
                     "Linear 95.0% (untrained 60.0%), knn 91.2% (untrained 50.0%)", "91.2%", "50.0%",
                     "3 images of <b>", "12 ", "3.5", "4.25", "25.0%", "4 s", "0.1 x 64/256 = 0.025", "a & b", "torn",
                     "<b>.jpg", "Skipped files (1)", "build_backbone('<b>'", "0.5, 0.25, 0.125", "float32"):
        assert expected in text, expected
    assert Page(tmp_path / "my run" / "report.html").tags.count("svg") == 10  # all curves but kNN, measured at the end only


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / '<img src=x onerror=alert(1)>&"', hostile=HOSTILE))
    assert text.count(HOSTILE) >= 6 and '<img src=x onerror=alert(1)>&"' in text
    compare([tmp_path / '<img src=x onerror=alert(1)>&"', write_run(tmp_path / "other")], tmp_path / "compare.html")
    assert HOSTILE in Page(tmp_path / "compare.html").text


def test_several_processes_are_shown_and_one_is_not(tmp_path: Path) -> None:
    assert "cpu, bf16, 2 processes" in page(write_run(tmp_path, amp="bf16", world_size=2, status="stopped"))
    alone = page(write_run(tmp_path, amp="off", world_size=1))
    assert "1 processes" not in alone and "cpu, off" not in alone


def test_best_on_the_way_is_named_where_there_is_one(tmp_path: Path) -> None:
    assert "best.pt" not in page(write_run(tmp_path / "none", best_knn=None, best_epoch=None))
    assert "98.1%  after epoch 20; that network is best.pt" in page(write_run(tmp_path / "one", best_knn=0.981, best_epoch=20))
    compare([tmp_path / "none", tmp_path / "one"], tmp_path / "both.html")
    assert re.search(r"best knn +98\.1% ", Page(tmp_path / "both.html").text)


def test_without_labels_it_says_so_and_shows_health(tmp_path: Path) -> None:
    text = page(write_run(tmp_path, labels=False, updates=12, retrieval_untrained=0.0625, retrieval=0.5, measured_images=256))
    assert "no class folders, so no accuracy" in text and "no labels" in text
    assert "Learned Retrieval 50.0% (untrained 6.2%)" in text and re.search(r"healthy: rising +6\.2% +50\.0%", text)
    assert "effective rank of the features" in text and "9 of 15" in text


def test_stopped_and_failed_runs_say_where_why_and_how_to_go_on(tmp_path: Path) -> None:
    write_run(tmp_path / "s", status="stopped", reason="SIGTERM", epochs=1, knn=None, linear=None)
    (tmp_path / "s" / "last.pt").touch()
    stopped = page(tmp_path / "s")
    assert "goes on from the last checkpoint, exactly" in stopped
    assert "Stopped after 1 of 2 epochs by SIGTERM" in stopped and "measured when the run is complete" in stopped
    command = re.search(r"python train.py .* --resume", stopped)
    assert command and parse_config(shlex.split(command[0])[2:]) == TrainConfig(
        data=("<b>",), out=str(tmp_path / "s"), epochs=2, seed=5, resume="")
    failed = page(write_run(tmp_path / "f", status="failed", reason="disk <full>", epochs=1))
    assert "Failed after 1 of 2 epochs" in failed and "disk <full>" in failed


def test_without_a_checkpoint_nothing_is_gone_on_from(tmp_path: Path) -> None:
    for status in ("failed", "stopped", "running"):
        text = page(write_run(tmp_path / status, status=status, epochs=0), under_way=True)
        assert "begins anew: no checkpoint was saved yet" in text and "exactly" not in text


@pytest.mark.parametrize("error", ["NonFiniteError", "NonFiniteFeaturesError"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_run_whose_numbers_ran_away_is_not_to_be_resumed(tmp_path: Path, saved: bool, error: str) -> None:
    write_run(tmp_path, status="failed", epochs=0, error=error,
              reason="the loss or a gradient is not finite at epoch 1, update 13 - start again with a lower --lr")
    if saved:
        (tmp_path / "last.pt").touch()
    text = page(tmp_path)
    assert "start again with a lower --lr" in text and "see the reason above" in text and "--resume" not in text


def test_collapsed_run_says_so_first_and_what_to_do(tmp_path: Path) -> None:
    write_lines(write_run(tmp_path), [line(n, spread=0.01) for n in range(1, 7)])
    text = page(tmp_path)
    assert text.index("Collapsed") < text.index("What to do:") < text.index("What it learned")
    assert "larger --batch-size than 64" in text


def test_run_under_way_is_told_from_one_that_ended(tmp_path: Path) -> None:
    write_run(tmp_path, status="running", epochs=1, knn=None, linear=None)
    (tmp_path / "last.pt").touch()
    text = page(tmp_path, under_way=True)
    assert "Learning, after 1 of 2 epochs" in text and "after an interruption" in text
    assert "Has not ended, or was cut off, after 1 of 2 epochs" in page(tmp_path)
    (tmp_path / "summary.json").unlink()
    assert "Has not ended, or was cut off, after 2 of 2 epochs" in page(tmp_path)


def test_a_run_that_was_cut_off_keeps_its_facts(tmp_path: Path) -> None:
    """Killed ten updates after its latest summary: what was measured before is still true."""
    write_run(tmp_path, status="running", epochs=2, knn=None, linear=None, updates=6, best_knn=0.75, best_epoch=1)
    for update in (3, 9):
        add_line(tmp_path, json.dumps({**line(update), "knn": 0.7}))
    text = page(tmp_path)
    assert read_run(tmp_path).status == "unknown" and "cut off, after 3 of 2 epochs" in text
    for expected in ("50.0%", "75.0%", "4 s", " 41 ", "cpu, float32", "3 images of <b>", " 9 "):
        assert expected in text, expected
    assert "Not measured" not in text
    change_json(tmp_path / "summary.json", updates=0, seconds=0.0, images_per_second=0.0, wait_fraction=0.0)
    assert "training time" not in page(tmp_path)  # which is not 0


@pytest.mark.parametrize("under_way", [False, True])
def test_what_is_not_measured_yet_is_not_said_to_be_left_out(tmp_path: Path, under_way: bool) -> None:
    write_run(tmp_path, status="running", knn=None, linear=None, knn_untrained=None, linear_untrained=None)
    assert "Not measured yet." in page(tmp_path, under_way)
    (tmp_path / "summary.json").unlink()
    assert "Not measured yet." in page(tmp_path)
    change_json(tmp_path / "config.json", config={"eval": False})
    assert "Not measured, as asked (--no-eval)." in page(tmp_path)


def test_accuracy_measured_on_the_way_has_a_column_until_the_end(tmp_path: Path) -> None:
    write_run(tmp_path, status="stopped", knn=None, linear=None)
    add_line(tmp_path, '{"update": 3, "epoch": 1.0, "knn": 0.6875}')
    learned = page(tmp_path).split("What it learned")[1].split("Health")[0]
    assert "after epoch 1" in learned and "68.8%" in learned and "50.0%" in learned
    change_json(tmp_path / "summary.json", knn=0.8125, status="finished")
    learned = page(tmp_path).split("What it learned")[1].split("Health")[0]
    assert "after epoch" not in learned and "81.2%" in learned and "68.8%" not in learned


def test_summary_of_an_earlier_end_is_not_believed(tmp_path: Path) -> None:
    write_run(tmp_path, status="stopped", updates=6)
    add_line(tmp_path, json.dumps(line(7)) + '\n{"update": 8, "ep')  # resumed, then killed while writing
    run = read_run(tmp_path)
    assert run.status == "unknown" and len(run.records) == 7
    assert "Has not ended" in page(tmp_path)


def test_empty_and_broken_folders_still_give_a_page(tmp_path: Path) -> None:
    assert "Has not ended" in page(tmp_path)
    for name in ("summary.json", "config.json", "metrics.jsonl", "backbone.json"):
        (tmp_path / name).write_text('["torn')
    assert "Has not ended" in page(tmp_path)


@pytest.mark.parametrize("name, content, expected", [
    ("config.json", '{"config": {}, "plan": null, "choices": [7], "data": [], "versions": "1"}', "Learned"),
    ("summary.json", '{"status": "finished"}', "Finished, but undecided"),
    ("summary.json", '{"status": 1, "updates": "6", "knn": "0.5", "world_size": null, "images": [1], "classes": {}}',
     "Has not ended, or was cut off, after 2 of 2 epochs"),
    ("views.png", "", "Learned"), ("views.png", "\x89PNG", "Learned"), ("views.png", "no picture " * 9, "Learned"),
    ("metrics.jsonl", "", "Finished, but without records to judge by"),
    ("metrics.jsonl", '{"update": 6, "epoch": 2.0, "loss": null, "spread": "0.5"}\n', "Finished, but without records"),
    ("metrics.jsonl", '{"update": "6", "epoch": "2"}\n{"update": 6, "epoch": NaN}\n', "Finished, but without records"),
    ("metrics.jsonl", '{"update": 6, "epoch": 2.0, "loss": 1.0, "spread": 0.9, "tau": 0.5, "rank": 1e999, "rank_limit": 15}\n',
     "Learned"),
    ("backbone.json", '{"arch": "<b>", "small_stem": 1, "image_size": "<b>", "mean": null, "std": 1}', "Learned"),
])
def test_damaged_files_cost_what_they_said_and_no_more(tmp_path: Path, capsys, name: str, content: str, expected: str) -> None:
    write_run(tmp_path, knn_untrained=0.5, rank_features_untrained=None)
    (tmp_path / name).write_text(content, "latin-1")
    assert main([str(tmp_path)]) == 0, capsys.readouterr().err
    assert expected in Page(tmp_path / "report.html").text


def test_damage_that_nobody_thought_of_is_one_line(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "run")
    change_json(tmp_path / "run" / "config.json", plan={"epochs": "two", "updates_per_epoch": "x"})
    change_json(tmp_path / "run" / "summary.json", resumed=[3])
    for arguments in ([], ["--out", str(tmp_path / "both.html")]):
        assert main([str(tmp_path / "run"), *arguments]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 'run'} has a damaged file") and said.count("\n") == 1


def test_no_epochs_are_no_damage(tmp_path: Path) -> None:
    assert "Finished without training" in page(write_run(tmp_path, updates=0, epochs=0))


def test_resumes_and_skipped_steps_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path)
    page(tmp_path)
    assert "mark resume" not in (tmp_path / "report.html").read_text()
    change_json(tmp_path / "summary.json", resumed=[3, "5"])
    write_lines(tmp_path, [line(n, skipped=1 if n > 4 else 0) for n in range(1, 7)])
    assert read_run(tmp_path).resumed == [1.0]
    page(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count('<line class="mark resume"') == html.count('<line class="mark skip"') == 10  # once per curve


def test_knn_curve_has_the_untrained_network_as_its_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    add_line(tmp_path, '{"update": 3, "epoch": 1.0, "knn": 0.7}')
    run = read_run(tmp_path)
    assert run.points("knn") == [(0.0, 0.5), (1.0, 0.7), (2.0, 0.912)]
    page(tmp_path)
    assert "untrained 50.0%" in (tmp_path / "report.html").read_text()


def test_pictures_that_would_make_the_page_too_large_are_named_instead(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "PICTURES_AT_MOST", 10)
    assert "see views.png in the run folder" in page(write_run(tmp_path))


def test_command_refuses_what_is_no_run(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not a run folder: no config.json in it\n"
    run = write_run(tmp_path / "run")
    assert main([str(run), "--out", str(tmp_path / "nowhere" / "both.html")]) == 2
    assert capsys.readouterr().err.startswith("error: --out ")
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--uot", "x"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --uot x - did you mean --out?\n"
