"""Values only: what a checkpoint holds, what is asked, and every decision about it. No tensor byte is read here."""
