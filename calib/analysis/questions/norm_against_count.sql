-- The length of the classifier's weight vectors against training instances, and how strongly they go together.
-- views: categories, classifier
--
-- One row per doubling of the count. The correlation is Pearson's between ln(1 + instances) and the norm over all
-- categories of the cache, the same in each of its rows; near 0 means the classifier favours nobody by length.
WITH joined AS (
    SELECT
        cache,
        instance_count,
        weight_norm,
        bias,
        CASE WHEN instance_count > 0 THEN floor(log2(instance_count)) ELSE -1 END AS doubling
    FROM categories
    JOIN classifier USING (cache, "index")
),
strength AS (
    SELECT cache, corr(ln(1 + instance_count), weight_norm) AS correlation FROM joined GROUP BY cache
)
SELECT
    cache,
    min(instance_count) AS fewest_instances,
    max(instance_count) AS most_instances,
    count(*) AS n,
    avg(weight_norm) AS mean_norm,
    min(weight_norm) AS smallest_norm,
    max(weight_norm) AS greatest_norm,
    avg(bias) AS mean_bias,
    any_value(correlation) AS correlation
FROM joined
JOIN strength USING (cache)
GROUP BY cache, doubling
ORDER BY cache, doubling;
