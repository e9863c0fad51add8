def pytest_collection_modifyitems(items):
    # The slow ones first, so that at the end no process of several works alone.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
