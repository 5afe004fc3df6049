"""What people look at: a page about a pruned file, and the card that goes with it when it is published."""
