from triton_interpreter import patch_language_once

patch_language_once()


def pytest_collection_modifyitems(items):
    # The slow ones first, so that at the end no process of several works alone.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
