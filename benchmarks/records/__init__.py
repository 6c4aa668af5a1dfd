"""Records on FineWeb: testing whether runs are one, and creating its folder."""
