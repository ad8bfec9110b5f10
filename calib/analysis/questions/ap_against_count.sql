-- AP against training instances: deciles of the categories by count, with the correlation over all categories.
-- views: results
--
-- rank_correlation is Spearman's, between AP and instance_count, over the run's categories that have objects.
WITH present AS (
    SELECT run, name, instance_count, AP
    FROM results
    WHERE AP >= 0 AND instance_count IS NOT NULL
),
ranked AS (
    SELECT
        *,
        ntile(10) OVER (PARTITION BY run ORDER BY instance_count, name) AS decile,
        rank() OVER (PARTITION BY run ORDER BY instance_count)
            + (count(*) OVER (PARTITION BY run, instance_count) - 1) / 2.0 AS count_rank,
        rank() OVER (PARTITION BY run ORDER BY AP) + (count(*) OVER (PARTITION BY run, AP) - 1) / 2.0 AS ap_rank
    FROM present
),
correlated AS (
    SELECT run, corr(count_rank, ap_rank ORDER BY name) AS rank_correlation
    FROM ranked
    GROUP BY run
)
SELECT
    run,
    decile,
    min(instance_count) AS fewest_instances,
    max(instance_count) AS most_instances,
    count(*) AS n,
    avg(AP) AS AP,
    count(*) FILTER (AP = 0) AS n_zero,
    any_value(rank_correlation) AS rank_correlation
FROM ranked
JOIN correlated USING (run)
GROUP BY run, decile
ORDER BY run, decile;
