from trtserve.server.model.progress import ProgressBar


def test_each_step_has_a_bar_on_stderr(capsys):
    with ProgressBar() as progress:
        progress("fetching", 0, 0)
        progress("fetching", 50, 100)
        progress("fetching", 100, 100)
        progress("converting", 3, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fetching: 100%" in captured.err
    assert "converting: 100%" in captured.err
