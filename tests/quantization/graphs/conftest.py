"""What the tests of static quantization share."""

import pytest


@pytest.fixture(scope="module")
def one_export():
    """`make_static` exports each model of a file once: exports are most of the time of these tests."""
    from hfshrink.quantization.graphs import static

    real, made = static.export_float, {}

    def cached(model, processor=None):
        if id(model) not in made:
            made[id(model)] = (model, real(model, processor))  # with the model, so that its id stays its own
        found = made[id(model)][1]
        return static._rebuild(found, found.components["model"].program.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "export_float", cached)
        yield cached
