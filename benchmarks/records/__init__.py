"""Records on FineWeb: testing whether runs make one, and making its folder."""
