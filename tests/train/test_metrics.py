import io
import json

import pytest

from gla_jax.train.metrics import Log, Progress, bits, duration, read_log


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7380, "2h03m")]
)
def test_durations(seconds, text):
    assert duration(float(seconds)) == text


def test_bits():
    assert bits(1.0) == pytest.approx(1.4426950408889634)


def test_a_log_goes_on_from_a_step_and_drops_what_came_after(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1 / 3})
    log.sync()
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    log = Log(path, 2)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert read_log(path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1 / 3}, {"step": 3, "loss": 0.5}]
    assert path.read_text().count("\n") == 3
    assert read_log(tmp_path / "none") == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_one_line_written_over(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    out = Terminal()
    progress = Progress(10, 500, out)
    assert [progress.step(step, 2.0) for step in (1, 2)] == [0.0, 500.0]
    first, last = out.getvalue().split("\r")[1:]
    assert first.strip() == "step  1/10  10% | loss 2.000 | 2.885 bits per byte | 0.0k tokens/s | ? left"
    assert last.strip() == "step  2/10  20% | loss 2.000 | 2.885 bits per byte | 0.5k tokens/s | 8s left"
    progress.note("a line")
    assert out.getvalue().endswith("\r" + " " * len(last) + "\ra line\n")


def test_progress_elsewhere_is_a_line_now_and_then_and_at_the_end(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    progress = Progress(30, 100, out, every=10.0)
    for step in range(1, 31):
        now += 1.0
        progress.step(step, 1.0)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/30", "11/30", "21/30", "30/30"]


def test_a_pause_does_not_count_as_slowness(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress(100, 10, io.StringIO())
    for step, at, speed in [(1, 50.0, 0.0), (2, 51.0, 10.0)]:  # 50 seconds of compiling are not the speed
        now = at
        assert progress.step(step, 1.0) == speed
    progress.pause()
    for step, at, speed in [(3, 100.0, 0.0), (4, 101.0, 10.0)]:
        now = at
        assert progress.step(step, 1.0) == speed


def test_the_loss_shown_is_smoothed(monkeypatch):
    out = io.StringIO()
    progress = Progress(2, 1, out, every=0.0)
    progress.step(1, 1.0)
    progress.step(2, 2.0)
    assert "loss 1.050" in out.getvalue()


def test_a_record_is_one_json_line(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.write({"step": 1, "text": "a\nb"})
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "text": "a\nb"}
