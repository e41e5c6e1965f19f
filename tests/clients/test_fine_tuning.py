"""The guide docs/fine-tuning.md: its blocks run in order."""

from test_docs import blocks, run_python


def test_the_guide(row, tmp_path, monkeypatch):
    row("trl", "the guide docs/fine-tuning.md: LoRA, merged, certified again; the whole model", "learned")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    run_python("docs/fine-tuning.md", namespace, *blocks("docs/fine-tuning.md"))
    losses = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert namespace["certificate"].certified == (tmp_path / "runs/chat-frozen").is_dir()
    assert len(namespace["answer"]) > 0
