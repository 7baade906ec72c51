"""Which tokens of other frames the queries of a geometry transformer read."""
