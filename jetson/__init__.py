"""What nanopatch knows about the board: memory now, health and set-up later. Standard library only."""
