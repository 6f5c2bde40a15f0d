"""What a cluster would do with a load: simulated on a virtual clock by the service's own policies. Knows neither Ray nor torch."""
