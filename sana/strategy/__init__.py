"""How a run is spread over devices: Lightning strategies and their checkpoint IO."""
