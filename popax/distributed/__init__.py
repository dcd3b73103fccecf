"""Several processes as one program: how they find each other, agree, notice a loss, and end."""
