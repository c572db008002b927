"""Other libraries' estimators as estimators of the house, so that the gate can check them; each library is used unmodified."""
