"""Other libraries' own objects on the operators here, one package for each."""
