import pytest


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, loaded once: the conversion is cached between runs."""
    from ponder.models.loading import load

    return load("smollm2-135m-instruct")
