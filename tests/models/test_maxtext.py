"""MaxText's own train step on an adapted decoder; needs the extra `maxtext`."""

import pytest

from tests.examples.test_markdown import ROOT, run

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.by_hand,
    pytest.mark.filterwarnings("ignore"),
]

MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "base_mlp_dim": 32,
    "base_moe_mlp_dim": 32, "megablox": "false",
}  # fmt: skip
# name -> changes of the page's configuration, what is adapted, its names
DECODERS = {
    "llama2, layers scanned": ({}, "decoder/*/kernel", ["kernel"]),
    "llama2, layers apart": ({"scan_layers": "false"}, "decoder/*/kernel", ["kernel"]),
    "gemma4": (
        {"decoder_block": "gemma4", "base_num_decoder_layers": 6,
         "sliding_window_size": 8}, "decoder/*/kernel", ["kernel"]),
    "mixtral": (
        {"decoder_block": "mixtral", **MOE},
        ["decoder/*/kernel", "decoder/*/wi_?", "decoder/*/wo"],
        ["kernel", "wi_0", "wi_1", "wo"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_the_page_holds_for(name, tmp_path, monkeypatch):
    """The page's assertions: base bit for bit, loss falls, resumed, merged."""
    monkeypatch.chdir(tmp_path)
    options, target, leaves = DECODERS[name]
    trained = {f"{leaf}_lora_{part}" for leaf in leaves for part in "ab"}
    text = (ROOT / "examples/howto/maxtext.md").read_text()
    for old, new in {
        "configure(options):": f"configure(options):\n    options |= {options}",
        'target="decoder/*/kernel"': f"target={target!r}",
        '{"kernel_lora_a", "kernel_lora_b"}': f"{trained}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    run("maxtext.md", text)
