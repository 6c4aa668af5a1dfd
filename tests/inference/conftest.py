"""Fixtures for the tests with Hugging Face's libraries."""

import pytest


@pytest.fixture(scope="session")
def exported(base, tmp_path_factory):
    """The folder of an exported run."""
    import export

    out = tmp_path_factory.mktemp("run") / "gpt"
    assert export.main([str(base.folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def own_caches(tmp_path_factory):
    """Caches for the code of models, which transformers copies and imports, and for data sets."""
    with pytest.MonkeyPatch.context() as patch:
        where = str(tmp_path_factory.mktemp("caches"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", where)
        patch.syspath_prepend(where)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", where)
        yield
