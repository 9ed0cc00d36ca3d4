"""What an export is compared on."""

import tiny
from hfshrink.quantization.graphs.parity import check_parity


def test_inputs_are_cut_to_what_the_export_reads():
    model, lengths = tiny.model("bert"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = check_parity(model, model, None, "text-classification", longest=4)
    assert set(lengths) == {4}
    assert found["max_difference"] == 0
    lengths.clear()
    check_parity(model, model, None, "text-classification")
    assert max(lengths) > 4
